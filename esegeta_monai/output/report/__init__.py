"""Pictures and reports of attribution maps.

picture.py   a PNG beside each map                planes.py    where left is
page.py      `write_report`: the HTML pages       collect.py   what lies in an output folder
embed.py     the volumes that a page carries      volumes.py   turned, coarsened, packed
words.py     what a page says                     charts.py    its curves
"""

from __future__ import annotations

from esegeta_monai.files.pictures.picture import INTENDED_USE, save_picture
from esegeta_monai.output.report.page import Written, report_path, write_report

__all__ = ["INTENDED_USE", "Written", "report_path", "save_picture", "write_report"]
