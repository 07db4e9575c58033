"""The other libraries of the table, by the name of their column."""

from tests.compatibility.peers.base import Peer, measure_peer
from tests.compatibility.peers.captum import CAPTUM
from tests.compatibility.peers.grad_cam import GRAD_CAM
from tests.compatibility.peers.monai import MONAI
from tests.compatibility.peers.torchray import TORCHRAY
from tests.compatibility.peers.zennit import ZENNIT

__all__ = ["PEERS", "Peer", "measure_peer"]

PEERS: dict[str, Peer] = {
    "captum": CAPTUM,
    "monai": MONAI,
    "zennit": ZENNIT,
    "torchray": TORCHRAY,
    "grad_cam": GRAD_CAM,
}
