"""Maps of several cases together: region tables, a common space, similarity, clusters, outliers, groups, one page.

maps.py      read the finished maps of an output folder
space.py     bring maps to a common space by transforms, mean and variance
transforms.py  read affine transforms and displacement fields of ITK and ANTs
cells.py     sum maps over cells that all cases share
regions.py   sums of maps over regions
clusters.py  spectral clustering (SpRAy), similarity, embedding, outliers
groups.py    permutation tests between two groups
table.py     read the table of groups
results.py   options, and results of a folder
analysis.py  all of it for one folder
page.py, pictures.py  the page and the tables
"""

from esegeta_monai.output.cohort.analysis import analyse
from esegeta_monai.output.cohort.page import write_cohort
from esegeta_monai.output.cohort.results import CohortOptions

__all__ = ["CohortOptions", "analyse", "write_cohort"]
