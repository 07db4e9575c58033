"""Sphinx configuration of the site; `make docs` builds it offline, with warnings as errors."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

from esegeta_monai.utils.files import INTENDED_USE, VERSION  # noqa: E402

project = "esegeta_monai"
author = "The esegeta_monai developers"
copyright = author
release = version = VERSION

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "site_pages"]
exclude_patterns = ["_build", "_ext", "examples", "notebooks"]  # notebooks: see tests/docs/test_notebooks.py
suppress_warnings = ["myst.strikethrough"]

# Pages are plain Markdown that also reads well in the repository.
myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]

# Docstrings: a name in single backticks links to the object where the site has it, and is code elsewhere.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Class attributes", "Attributes")]
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
add_module_names = False

html_theme = "pydata_sphinx_theme"
html_title = "esegeta_monai"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_sidebars = {"index": []}
html_theme_options = {
    "navbar_align": "left",
    "header_links_before_dropdown": 6,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "announcement": INTENDED_USE,
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
}

# Addresses that answer programs with an error, or need a login.
linkcheck_ignore = [r"https://doi\.org/.*", r"https://www\.mdpi\.com/.*"]
