"""Other frameworks: TorchIO's subjects and Lightning's trainer.

    torchio.py     subjects in and out, with the history inverted; windows of GridSampler and GridAggregator
    lightning.py   run the handlers of this package in the validation of a Lightning trainer

Their packages are optional: ``pip install "esegeta-monai[torchio]"``, ``"esegeta-monai[lightning]"``. The modules can
be imported without them.
"""
