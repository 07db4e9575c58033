"""HTML reports of attribution maps.

page.py      `write_report`: the HTML pages       collect.py   read an output folder
embed.py     data and volumes of a page           volumes.py   reorient, downsample and pack volumes
words.py     texts of a page                      charts.py    curves as SVG
reading.py   read files leniently                 viewer3d.py  optional 3D view
"""

from __future__ import annotations

from esegeta_monai.files.pictures.picture import INTENDED_USE, save_picture
from esegeta_monai.output.report.page import Written, report_path, write_report

__all__ = ["INTENDED_USE", "Written", "report_path", "save_picture", "write_report"]
