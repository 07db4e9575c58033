"""``esegeta-monai app``: a page on this machine on which a click on a voxel asks the network why."""

from __future__ import annotations

import importlib
import socket
import sys
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import esegeta_monai.files as storage
from esegeta_monai.cli.cases import find_cases
from esegeta_monai.cli.demo import find_bundle, template_scripts
from esegeta_monai.cli.reading import check_options
from esegeta_monai.cli.trust import require_trust
from esegeta_monai.errors import UsageError
from esegeta_monai.utils.files import INTENDED_USE

__all__ = ["BUNDLE", "listen", "run", "server_of", "start", "template"]

BUNDLE = Path("bundles") / "brain_tissue_segmentation"
"""The bundle that the app opens without --bundle."""

WORKER = [sys.executable, "-m", "esegeta_monai.cli.app_worker"]


def run(args: Namespace, *_: object) -> int:
    """Open the bundle in a worker process, and serve the page until Ctrl-C.

    Raises:
        EsegetaError: an option is wrong, the extra ``app`` is not installed, or the bundle is not trusted.
    """
    if args.totalsegmentator is not None:
        raise UsageError("the app opens a bundle or an nnU-Net folder; explain tasks of TotalSegmentator by 'explain'")
    if args.bundle is None and args.nnunet is None:
        args.bundle = str(find_bundle(BUNDLE))
    check_options(args)
    require_trust(args)
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise UsageError(f'the app needs {" and ".join(missing)}: pip install "esegeta-monai[app]"')
    output = storage.writable_folder(args.output)
    if args.input is None:
        args.input = [str(_template(args, output))]
    cases = find_cases(args.input, leave_out=output)
    if not any(file.exists() for case in cases for file in case.files):
        raise UsageError(f"--input {' '.join(args.input)}: there is no such file or folder")
    listening = listen(args.port)
    app = start(args, output)
    try:
        if app.worker.problem is not None:
            raise UsageError(app.worker.problem)
        port = listening.getsockname()[1]
        print(f"Open http://127.0.0.1:{port}/start?token={app.session.token}", flush=True)
        print("This address works once, for one browser. Ctrl-C ends the app.", flush=True)
        print(INTENDED_USE, flush=True)
        server_of(app).run(sockets=[listening])
    finally:
        listening.close()
        app.close()
    return 0


def start(args: Namespace, output: Path) -> Any:
    """Return the `esegeta_monai.app.server.App` of these arguments, with its bundle open or its problem known."""
    server = importlib.import_module("esegeta_monai.app.server")  # needs the extra
    plain = (str, int, float, bool, list, type(None))
    arguments = {k: v for k, v in vars(args).items() if isinstance(v, plain) and k not in ("allowed", "trust", "port")}
    arguments |= {"trust": False, "output": str(output)}  # the worker asks the store of trusted bundles
    app = server.App(WORKER, arguments, output)
    app.worker.start()
    app.worker.wait_until_open(600)
    return app


def server_of(app: Any) -> Any:
    """Return the `uvicorn.Server` of an app; its ``run`` takes the sockets."""
    uvicorn = importlib.import_module("uvicorn")
    config = uvicorn.Config(
        app.asgi,
        log_level="warning",
        access_log=False,  # an address holds the token
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=2,
        ws="none",
    )
    return uvicorn.Server(config)


def listen(port: int) -> socket.socket:
    """Return a socket that listens on the loopback address.

    Raises:
        UsageError: the port is taken.
    """
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(("127.0.0.1", port))
    except OSError as error:
        listening.close()
        raise UsageError(f"--port {port}: {error.strerror}; choose another, or 0 for a free one") from error
    listening.listen(64)
    return listening


def _template(args: Namespace, output: Path) -> Path:
    """Return the template of the demonstration bundle.

    Raises:
        UsageError: another bundle is opened, which has none.
    """
    from esegeta_monai.bundle.reader import BundleReader

    if args.nnunet is not None or Path(args.bundle).resolve() != find_bundle(BUNDLE).resolve():
        raise UsageError("give the scans by --input SCANS")
    return template(BundleReader(args.bundle, weights="optional"), output)


def template(reader: Any, output: Path) -> Path:
    """Return the file of the template, which the scripts of an open bundle create once.

    Raises:
        UsageError: nilearn or the scripts are missing.
    """
    with template_scripts(reader):
        anatomy: Any = importlib.import_module("scripts.anatomy")
        return Path(anatomy.template_case(output / "mni152")["image"])
