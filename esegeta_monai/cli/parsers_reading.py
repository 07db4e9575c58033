"""The options of the commands that read results, a bundle, or the lists of methods, targets and metrics.

This module imports nothing that takes long, so that ``--help`` comes at once.
"""

from __future__ import annotations

from argparse import ArgumentParser

from esegeta_monai.cli.arguments import (
    add_bundle,
    add_head,
    add_model,
    add_network,
    count,
)

__all__ = [
    "add_check",
    "add_cohort",
    "add_import_esegeta",
    "add_info",
    "add_layers",
    "add_merge",
    "add_merge_runs",
    "add_overlay",
    "add_report",
    "add_table",
]


REPORT_DESCRIPTION = """\
Writes OUTPUT/CASE/CASE_report.html for each case and OUTPUT/index.html from the results of 'explain' and, if
it was run, 'evaluate' in OUTPUT; also after a run that failed or was stopped. Each page is a single file and opens in a
browser without a network connection. It shows the names of cases, but no names of folders or scan files."""


def add_report(parser: ArgumentParser) -> None:
    """Add the arguments of ``report``."""
    parser.description = REPORT_DESCRIPTION
    parser.add_argument("output", metavar="OUTPUT", help="the output folder of 'explain'")
    parser.add_argument(
        "--neurological", action="store_true", help="patient's left on the viewer's left (default: radiological)"
    )
    parser.add_argument(
        "--view-3d",
        action="store_true",
        help="add a 3D view (needs NiiVue, included in nilearn; 2.3 MB per page); a head can be recognised",
    )


COHORT_DESCRIPTION = """Analyses the maps of an output folder over its cases, for each target and method: shares of
regions, similarity of maps, clusters (SpRAy), outliers, and tests between two groups of patients. With a common space
also mean and variance maps, and tests of voxels. It writes cohort.html, tables and maps into OUTPUT/cohort."""


COHORT_EPILOG = """transforms (from the reference to the scan, as ITK and ANTs write them when the reference is fixed):
  identity                   the scans are in the space of the reference already
  transforms/                a folder with CASE….mat, .txt, .tfm, .h5, or a displacement field CASE….nii.gz; of ANTs
                             also CASE_0GenericAffine.mat and CASE_1Warp.nii.gz together
  CASE=warp.nii.gz,a.mat     files of one case, in the order of 'antsApplyTransforms -t': the last one is applied first

groups:
  a CSV with the columns case and group (two names), and where known patient (the unit of a test), site (patients are
  permuted within sites), and other variables, such as scanner, which clusters are compared with

exit codes: 0 all cases were used, or had an empty target; 1 some case is missing, failed or was altered; 2 usage error
"""


def add_cohort(parser: ArgumentParser) -> None:
    """Add the arguments of ``cohort``."""
    parser.description, parser.epilog = COHORT_DESCRIPTION, COHORT_EPILOG
    parser.add_argument("output", metavar="OUTPUT", help="the output folder of 'explain'")
    parser.add_argument("--write-to", metavar="DIR", help="folder of the results (default: OUTPUT/cohort)")
    parser.add_argument("--space", metavar="REFERENCE", help="image of the common space; needs --transforms")
    parser.add_argument("--transforms", nargs="+", metavar="T", help="how the scans get there (see below)")
    parser.add_argument(
        "--regions",
        metavar="FILE",
        help="folder of label maps (CASE.nii.gz), or one label map in the common space (default: tables of 'evaluate')",
    )
    parser.add_argument("--region-names", metavar="N=NAME,...", help="names of region values, such as 1=liver,2=spleen")
    parser.add_argument("--groups", metavar="CSV", help="table of cases with two groups (see below)")
    parser.add_argument(
        "--correction",
        choices=("max", "BH", "BY"),
        default="max",
        help="of tests of regions: family-wise by the largest |t|, or the false discovery rate (default: max)",
    )
    parser.add_argument(
        "--voxels",
        choices=("max-t", "cluster-mass"),
        default="max-t",
        help="test of voxels in the common space (default: max-t)",
    )
    parser.add_argument("--level", type=float, default=0.05, metavar="P", help="significance level (default: 0.05)")
    parser.add_argument(
        "--permutations", type=count, default=1999, metavar="N", help="permutations of patients (default: %(default)s)"
    )
    parser.add_argument(
        "--extent",
        type=float,
        metavar="MM",
        help="edge of the cube around the target in which maps are compared, without a common space (default: the "
        "largest field of view)",
    )
    parser.add_argument(
        "--target", action="append", metavar="NAME", help="only this target, as in run.json; repeatable"
    )
    parser.add_argument(
        "--method", action="append", metavar="NAME", help="only this method, as in run.json; repeatable"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all random numbers (default: 0)")


MERGE_RUNS_DESCRIPTION = """\
Writes OUTPUT/run.json from the journals of all parts (--num-parts, --part-id) that wrote into OUTPUT. If the parts had
output folders of their own, give these too: their maps, records and rows of metrics.csv are copied into OUTPUT first.
A file that two folders have with different contents is refused, and nothing is written."""


def add_merge_runs(parser: ArgumentParser) -> None:
    """Add the arguments of ``merge-runs``."""
    parser.description = MERGE_RUNS_DESCRIPTION
    parser.epilog = "exit codes: 0 all parts finished without a failure; 1 a part is not finished, or a result failed"
    parser.add_argument("output", metavar="OUTPUT", help="the output folder of the whole run")
    parser.add_argument("others", nargs="*", metavar="FOLDER", help="output folders of further parts")


def add_table(parser: ArgumentParser) -> None:
    """Add the arguments of ``methods``, ``targets`` and ``metrics``."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="print the full description of one of them")
    parser.add_argument(
        "--bundle", metavar="DIR", help="also list those of this bundle's scripts/, which are read, not imported"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_layers(parser: ArgumentParser) -> None:
    """Add the arguments of ``layers``."""
    add_model(parser)
    _add_class(parser)
    parser.add_argument("--input", metavar="FILE", help="scan to run the network on (default: noise of one window)")
    add_network(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_class(parser: ArgumentParser) -> None:
    parser.add_argument("--target", metavar="CLASS", help="class whose model is meant, for --totalsegmentator")


def add_info(parser: ArgumentParser) -> None:
    """Add the arguments of ``info``."""
    add_model(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


CHECK_DESCRIPTION = (
    """Checks what maps take for granted, on one scan or on noise, and prints the results. No map is computed."""
)


CHECK_EPILOG = """verdicts:
  passed       the assumption holds
  handled      it does not hold, and the computation takes care of it
  warned       maps may be wrong in the way that is stated
  refused      no map is computed, for the stated reason
  not checked  it cannot be checked here

Without --input, the input is noise of one window: the geometry is not checked, and what depends on the values of a scan
(the range of the output, for example) may differ.

exit codes: 0 nothing was refused; 1 a check refused; 2 usage error, or the scan cannot be used
"""


def add_check(parser: ArgumentParser) -> None:
    """Add the arguments of ``check``."""
    parser.description, parser.epilog = CHECK_DESCRIPTION, CHECK_EPILOG
    add_model(parser)
    _add_class(parser)
    parser.add_argument("--input", metavar="INPUT", help="one scan, as for 'explain' (default: noise of one window)")
    add_network(parser)
    add_head(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_overlay(parser: ArgumentParser) -> None:
    """Add the arguments of ``overlay``."""
    add_model(parser)
    parser.add_argument(
        "--output", metavar="FILE", help="output file (default: explain.json in DIR/configs, or in the nnU-Net folder)"
    )
    parser.add_argument(
        "--multi-gpu", action="store_true", help="also write multi_gpu_explain.json, for several processes"
    )
    parser.add_argument(
        "--metrics",
        action="store_true",
        help="write explain_metrics.json, which evaluates the maps as 'evaluate' does; alone or after explain.json",
    )
    parser.add_argument(
        "--path", action="store_true", help="write nothing; print the path of the overlay in the package"
    )


def add_import_esegeta(parser: ArgumentParser) -> None:
    """Add the arguments of ``import-esegeta``."""
    parser.add_argument("config_file", metavar="CONFIG", help="JSON configuration of TorchEsegeta")
    add_bundle(parser, required=True)
    parser.add_argument("--all", action="store_true", help='also methods with "use": false')
    parser.add_argument(
        "--layer",
        action="append",
        metavar="THEIRS=OURS",
        help="the name of a layer in this network, such as Conv5=model.4; may be repeated",
    )
    parser.add_argument("--output", metavar="FILE", help="output file (default: explain.json in DIR/configs)")


def add_merge(parser: ArgumentParser) -> None:
    """Add the arguments of ``merge``."""
    add_bundle(parser, required=True)
    parser.add_argument(
        "--add",
        action="append",
        metavar="FILE",
        help="file merged after the config (default: the overlay for this bundle); may be repeated",
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="output file; existing files are not replaced")
