"""A bundle workflow with explanations for ``python -m monai.bundle run_workflow``, for any ids."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.utils import merge_kv

from esegeta_monai.bundle.config_overrides import check_settings
from esegeta_monai.bundle.metadata import BundleMetadata
from esegeta_monai.bundle.overlay import fitted_overlay
from esegeta_monai.bundle.reader import run_id_of

__all__ = ["ExplainWorkflow"]

logger = logging.getLogger("esegeta_monai")


class ExplainWorkflow(ConfigWorkflow):
    """A bundle's own inference workflow with an `ExplanationHandler` added to the evaluator's handlers.

    It applies the overlay of ``esegeta-monai overlay`` in memory, so a bundle needs no list called ``handlers``, no
    ``output_dir`` and no run id ``run``.

    Args:
        config_file: one or more config files of the bundle; None: ``configs/inference.json``.
        run_id: the id to run; None: the id that runs the evaluator.
        override: values by id, as for `ConfigWorkflow`; ids that begin with ``explain_`` are settings of the overlay
            (``explain_methods``, ``explain_targets``, ``explain_output_dir``, ``explain_handler#pictures``, …).

    Raises:
        UsageError: the config has no evaluator, or no id runs it.

    Example::

        python -m monai.bundle run_workflow esegeta_monai.bundle.ExplainWorkflow \\
            --config_file configs/inference.json --bundle_root . --explain_methods Saliency
    """

    def __init__(
        self,
        config_file: str | Sequence[str] | None = "configs/inference.json",
        meta_file: str | Sequence[str] | None = None,
        logging_file: str | bool | None = None,
        init_id: str = "initialize",
        run_id: str | None = None,
        final_id: str = "finalize",
        tracking: str | dict | None = None,
        workflow_type: str | None = "inference",
        properties_path: Any = None,
        **override: Any,
    ) -> None:
        settings = {key: override.pop(key) for key in list(override) if key.startswith("explain_")}
        super().__init__(
            config_file=config_file or "configs/inference.json",
            meta_file=meta_file,
            logging_file=logging_file,
            init_id=init_id,
            run_id=run_id or "run",
            final_id=final_id,
            tracking=tracking,
            workflow_type=workflow_type,
            properties_path=properties_path,
            **override,
        )
        metadata = BundleMetadata(self.parser.get(ConfigParser.meta_key) or {})
        overlay = fitted_overlay(self.parser, metadata)
        check_settings(settings, {key.lstrip("+") for key in overlay})
        for key, value in overlay.items():
            merge_kv(self.parser, key, value)
        self.parser.update(pairs=settings)
        self.run_id = run_id or run_id_of(self.parser)
        logger.info("explaining: run id %s, %s", self.run_id, self.parser["explain_methods"])
