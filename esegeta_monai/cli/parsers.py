"""The options of each command. This module imports nothing that takes long, so that ``--help`` comes at once."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError

from esegeta_monai.cli.arguments import (
    add_bundle,
    add_computing_options,
    add_hard_limit,
    add_head,
    add_model,
    add_network,
    add_parts,
    add_run_options,
    add_share,
    add_trust,
    count,
)

__all__ = [
    "add_app",
    "add_check",
    "add_cohort",
    "add_concepts",
    "add_demo",
    "add_evaluate",
    "add_explain",
    "add_import_esegeta",
    "add_influence",
    "add_info",
    "add_layers",
    "add_merge",
    "add_merge_runs",
    "add_overlay",
    "add_patterns",
    "add_report",
    "add_table",
]


EXPLAIN_DESCRIPTION = """Explains a bundle's predictions on your scans. For each case, target and method it writes
OUTPUT/CASE/CASE_TARGET_METHOD_attr.nii.gz (the map, on the voxel grid of the scan), .png (a picture) and .json (the
record), OUTPUT/run.jsonl with one line per result while it runs, and OUTPUT/run.json with all of them at the end.
Finished maps are skipped, so that the same command resumes an interrupted run. The bundle itself is not changed."""


EXPLAIN_EPILOG = """inputs:
  scan.nii.gz                a scan; the case is named "scan"
  scans/                     every scan in the folder and its subfolders, sorted
  t1.nii.gz,t2.nii.gz        one case whose channels are in several files, in the network's order
  patients/                  a folder with one file for each channel of the network, named after the channels in
                             metadata.json (p1/p1_T1c.nii.gz, p1/p1_FLAIR.nii.gz, ...) is one case
  p7=scan.nii.gz             the case is named "p7"

exit codes: 0 all done; 1 one case or method failed (the others are complete, run.json has the reasons); 2 usage error;
128 + N stopped by signal N (130: Ctrl-C)
"""


def add_explain(parser: ArgumentParser) -> None:
    """Add the arguments of ``explain``."""
    parser.description, parser.epilog = EXPLAIN_DESCRIPTION, EXPLAIN_EPILOG
    add_model(parser)
    parser.add_argument("--input", nargs="+", required=True, metavar="INPUT", help="scans (see below)")
    parser.add_argument("--output", required=True, metavar="DIR", help="output folder; created if missing")
    parser.add_argument(
        "--methods",
        action="append",
        metavar="LIST",
        help="method names, separated by commas, with parameters in parentheses (default: Saliency,GradCam; "
        "'esegeta-monai methods' lists all)",
    )
    parser.add_argument(
        "--target",
        action="append",
        metavar="TARGET",
        help='target, such as "MultiClassMask(class_index=1)" or "MultiClassMask(\'spleen\')"; may be repeated '
        "(default: every predicted class except background; 'esegeta-monai targets' lists all)",
    )
    parser.add_argument(
        "--agreement",
        action="store_true",
        help="also write where the folds of an ensemble, and its mirrored views, agree: their standard deviation as a "
        "map, and figures in the record and report (takes the passes up to twice more)",
    )
    parser.add_argument(
        "--layout",
        choices=["plain", "bids"],
        help="'bids': a folder of BIDS derivatives (default: as the folder is, 'plain' for a new one)",
    )
    parser.add_argument("--report", action="store_true", help="write the HTML report at the end")
    add_network(parser)
    add_head(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="compute and write no maps; print the estimated passes, time and memory per case, target and method",
    )
    add_run_options(parser)
    add_share(parser)
    add_parts(parser)
    add_hard_limit(parser)


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


EVALUATE_DESCRIPTION = """\
Evaluates maps by metrics: faithfulness to the network, robustness, sensitivity to the network's weights, and
localisation of a known cause. Three control maps that do not depend on the network (random, edges of the image,
constant) are evaluated too; methods that are no better are listed. It writes OUTPUT/metrics.csv (one row per case,
target, method and metric), OUTPUT/CASE/CASE_metrics.json (with curves and parameters) and OUTPUT/CASE/CASE_regions.csv
(sums of the map per region, channel and distance)."""


EVALUATE_EPILOG = """labels:
  A label map marks the known cause. Localisation metrics (pointing game, relevance mass, ...) need one; it may be on
  any grid. A folder must contain one file per case: CASE.nii.gz, or one whose name begins with CASE_.

exit codes: 0 all done (including undefined and inapplicable metrics), 1 something failed,
2 usage error
"""


def add_evaluate(parser: ArgumentParser) -> None:
    """Add the arguments of ``evaluate``."""
    parser.description, parser.epilog = EVALUATE_DESCRIPTION, EVALUATE_EPILOG
    add_model(parser)
    parser.add_argument("--input", nargs="+", required=True, metavar="INPUT", help="scans, as for 'explain'")
    parser.add_argument("--output", required=True, metavar="DIR", help="output folder; created if missing")
    parser.add_argument(
        "--maps", metavar="DIR", help="evaluate the maps in this output folder of 'explain' instead of computing them"
    )
    parser.add_argument(
        "--methods",
        action="append",
        metavar="LIST",
        help="methods (default: those of --maps, else Saliency,GradCam)",
    )
    parser.add_argument(
        "--target",
        action="append",
        metavar="TARGET",
        help="targets (default: those of --maps, else every predicted class except background)",
    )
    parser.add_argument(
        "--metrics",
        action="append",
        metavar="LIST",
        help="'quick' (default: takes about as long as the maps), 'full', 'all', or names, separated by commas, "
        "with parameters in parentheses ('esegeta-monai metrics' lists all)",
    )
    parser.add_argument(
        "--label", metavar="FILE", help="label map, or folder of label maps named like the cases (see below)"
    )
    parser.add_argument(
        "--label-value",
        type=_label_value,
        metavar="N",
        help="label value of the cause: a number, or 'class' for the target's class (default: all above 0)",
    )
    parser.add_argument(
        "--regions", metavar="FILE", help="label map, or folder of label maps, for the region tables (default: --label)"
    )
    parser.add_argument("--region-names", metavar="N=NAME,...", help="names of region values, such as 1=liver,2=spleen")
    parser.add_argument(
        "--body", metavar="FILE", help="body mask, or a folder of masks (default: the image's foreground)"
    )
    parser.add_argument(
        "--outside-alarm", type=_fraction, default=0.1, metavar="SHARE",
        help="raise the region alarm if more than this share of a map is outside the body (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--no-controls",
        dest="controls",
        action="store_false",
        help="do not evaluate the control maps (random, Sobel, constant)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="measure and write nothing; print the estimated passes and time per case",
    )
    add_network(parser)
    add_head(parser)
    add_computing_options(parser)
    add_share(parser)
    add_parts(parser)
    add_hard_limit(parser)


def _label_value(text: str) -> int | str:
    if text != "class" and (not text.isdigit() or int(text) < 1):
        raise ArgumentTypeError(f"{text!r} is neither a positive integer nor 'class'")
    return text if text == "class" else int(text)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


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


CONCEPTS_DESCRIPTION = """\
Lists the channels of a layer through which most relevance of the target flows (concept relevance propagation), as the
mean share over the scans, and for each channel the scans with the largest shares: one region a scan, as large as the
receptive field of the channel's unit. It writes OUTPUT/concepts.html, pictures, and OUTPUT/concepts.csv with the share
of every channel in every scan.

With --concept or --concept-cases it tests whether the network uses given concepts (TCAV), against random ones, and
writes OUTPUT/concept_tests.html, .csv and .json. With --find it looks for concepts that parts of many scans share (ACE
or CRAFT), and writes OUTPUT/found_concepts.html, .csv, .json and pictures."""


CONCEPTS_EPILOG = """concepts:
  --concept tumour=masks/       a folder with one mask for each scan that shows it (named as the scan, or SCAN_...), or
                                one file on the grid of all scans; above 0 is the concept. Scans without a mask are
                                explained, but are no examples. At least 4 scans need a mask.
  --concept-cases motion=ill/   scans that show the concept as a whole; the others of --input are without it

exit codes: 0 all done; 1 a scan failed (the others are complete); 2 usage error, or too few scans
"""


def add_concepts(parser: ArgumentParser) -> None:
    """Add the arguments of ``concepts``."""
    parser.description, parser.epilog = CONCEPTS_DESCRIPTION, CONCEPTS_EPILOG
    add_model(parser)
    parser.add_argument("--input", nargs="+", required=True, metavar="INPUT", help="scans, as for 'explain'")
    parser.add_argument("--output", required=True, metavar="DIR", help="output folder; created if missing")
    parser.add_argument(
        "--layer",
        action="append",
        metavar="NAME",
        help="layer (default: chosen for the network, see 'layers'); with --concept it may be repeated",
    )
    parser.add_argument("--target", metavar="TARGET", help="target (default: every predicted class except background)")
    parser.add_argument(
        "--channels", type=count, default=8, metavar="N", help="channels to show (default: %(default)s)"
    )
    parser.add_argument("--regions", type=count, default=4, metavar="N", help="scans for each channel (default: 4)")
    parser.add_argument(
        "--concept", action="append", metavar="NAME=MASKS", help="test a concept that masks mark; may be repeated"
    )
    parser.add_argument(
        "--concept-cases", action="append", metavar="NAME=SCANS", help="test a concept that whole scans show"
    )
    parser.add_argument(
        "--body", metavar="FILE", help="where random concepts may be: a mask, or a folder (default: the foreground)"
    )
    parser.add_argument("--random", type=count, default=199, metavar="K", help="random concepts (default: %(default)s)")
    parser.add_argument(
        "--statistic", choices=("share", "mean"), default="share",
        help="what is tested: the share of scans in which the score rises along the concept, or the mean rise; choose "
        "before looking (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--where", choices=("mask", "everywhere"), default="mask",
        help="add the concept to the layer within its mask, or everywhere (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--alpha", type=_fraction, default=0.05, metavar="P",
        help="level of all tests together, by Holm (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--find", choices=("ACE", "CRAFT"), help="find concepts by clustering, or by factorisation")
    parser.add_argument("--concepts", type=count, default=8, metavar="N", help="concepts to find (default: 8)")
    parser.add_argument(
        "--units", default="supervoxels(n_segments=100)", metavar="SPEC",
        help="parts of a scan for --find, such as 'grid(size=16)' (default: %(default)s)",
    )  # fmt: skip
    add_network(parser)
    add_head(parser)
    add_computing_options(parser)


INFLUENCE_DESCRIPTION = """\
Lists which training cases raised or lowered a prediction, by the gradients of the target and of the training loss at
checkpoints of the training (TracIn, or a projection like TRAK's). It writes OUTPUT/influence.html with the most helpful
and most harmful cases and those that act most on themselves (wrong labels are often among them), OUTPUT/influence.csv
with all scores, and OUTPUT/influence.json.

A first approximation: each step of the training counts as plain SGD on the case's loss on fixed patches, in evaluation
mode and without augmentation."""


INFLUENCE_EPILOG = """labels:
  --labels labels/       a folder with one label map for each training scan (named as the scan, or SCAN_...)
  --labels table.csv     for classification: a table with the columns case and label (the number of the class)

The loss is the id loss, loss_function or train#trainer#loss_function of configs/train.json (--train-config), or --loss.

exit codes: 0 all done; 1 a scan failed (the others are complete); 2 usage error
"""


def add_influence(parser: ArgumentParser) -> None:
    """Add the arguments of ``influence``."""
    parser.description, parser.epilog = INFLUENCE_DESCRIPTION, INFLUENCE_EPILOG
    add_model(parser)
    parser.add_argument("--input", nargs="+", required=True, metavar="INPUT", help="scans to explain")
    parser.add_argument("--training", nargs="+", required=True, metavar="INPUT", help="training scans, as --input")
    parser.add_argument("--labels", required=True, metavar="PATH", help="labels of the training scans (see below)")
    parser.add_argument(
        "--checkpoints", nargs="+", required=True, metavar="FILE", help="checkpoints of the training, state dicts"
    )
    parser.add_argument(
        "--learning-rates", nargs="+", type=_above_zero, metavar="RATE",
        help="learning rate at each checkpoint (default: all equal)",
    )  # fmt: skip
    parser.add_argument("--output", required=True, metavar="DIR", help="output folder; created if missing")
    parser.add_argument("--target", metavar="TARGET", help="target (default: every predicted class except background)")
    parser.add_argument("--train-config", metavar="FILE", help="config with the loss (default: configs/train.json)")
    parser.add_argument("--loss", metavar="JSON", help='the training loss, such as \'{"_target_": "DiceCELoss", ...}\'')
    parser.add_argument("--method", choices=("TracIn", "TRAK"), default="TracIn", help="method (default: %(default)s)")
    parser.add_argument(
        "--form", choices=("cosine", "dot"), default="cosine",
        help="TracIn: cosine of the two gradients, or their product times the learning rate (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--projection", type=count, default=1024, metavar="N",
        help="TRAK: numbers that a gradient is projected to (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--ridge", type=_above_zero, default=0.01, metavar="SHARE",
        help="TRAK: ridge, as a share of the mean squared length of a gradient (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--layer", action="append", metavar="NAME", help="only weights of this layer; may be repeated")
    parser.add_argument(
        "--patch-size", nargs="+", type=int, metavar="N", help="patch of the training (default: the inferer's window)"
    )
    parser.add_argument(
        "--patches", type=count, default=16, metavar="N", help="most patches of a scan (default: %(default)s)"
    )
    parser.add_argument("--cases", type=count, default=6, metavar="N", help="cases in each list (default: %(default)s)")
    add_network(parser)
    add_head(parser)
    add_computing_options(parser)


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def add_merge_runs(parser: ArgumentParser) -> None:
    """Add the arguments of ``merge-runs``."""
    parser.description = MERGE_RUNS_DESCRIPTION
    parser.epilog = "exit codes: 0 all parts finished without a failure; 1 a part is not finished, or a result failed"
    parser.add_argument("output", metavar="OUTPUT", help="the output folder of the whole run")
    parser.add_argument("others", nargs="*", metavar="FOLDER", help="output folders of further parts")


APP_DESCRIPTION = """Opens a page on this machine for a bundle and scans: click a voxel or a component, and ask why the
network gives it its class, and not another one; replace a box and see how the score changes. Each job is a command,
which the page shows; its results are in OUTPUT, as those of 'explain'. The server listens on the loopback address
only."""

APP_EPILOG = """The printed address works once, for one browser. On another computer, over SSH:
  ssh -L 8765:127.0.0.1:8765 HOST     then open the printed address in the browser here (same port)
"""


def add_app(parser: ArgumentParser) -> None:
    """Add the arguments of ``app``."""
    parser.description, parser.epilog = APP_DESCRIPTION, APP_EPILOG
    add_model(parser)
    parser.add_argument("--input", nargs="+", metavar="SCANS", help="scans, as for 'explain' (default: a template)")
    parser.add_argument("--output", default="app_output", metavar="DIR", help="output folder (default: %(default)s)")
    parser.add_argument(
        "--port", type=_port, default=8765, metavar="N", help="port; 0: a free one (default: %(default)s)"
    )
    add_network(parser)
    add_head(parser)


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise ArgumentTypeError(f"{text!r} is not a port")
    return int(text)


def add_demo(parser: ArgumentParser) -> None:
    """Add the arguments of ``demo``."""
    parser.add_argument("--output", default="demo_output", metavar="DIR", help="output folder (default: %(default)s)")
    parser.add_argument(
        "--bundle",
        metavar="DIR",
        help="folder of a bundle brain_lesion_classification (default: the one of this package)",
    )
    parser.add_argument(
        "--methods", action="append", metavar="LIST", help="methods to run instead of those of the demo"
    )
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:1 (default: cuda if available)")
    add_trust(parser)
    add_run_options(parser)
    parser.set_defaults(config=None, override=None, network_output=None, layer_axes=[], head=None, share="cases")


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


def add_patterns(parser: ArgumentParser) -> None:
    """Add the arguments of ``patterns``."""
    add_model(parser)
    parser.add_argument("--input", nargs="+", required=True, metavar="INPUT", help="scans, as for 'explain'")
    parser.add_argument("--output", metavar="FILE", help="output file (default: models/patterns.pt in the bundle)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    add_network(parser)


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
