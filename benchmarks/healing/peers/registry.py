"""Which peers there are, by the name that the command line takes."""

from __future__ import annotations

from benchmarks.healing.peers.base import Peer
from benchmarks.healing.peers.batch_norm import BatchStatistics, Tent
from benchmarks.healing.peers.cotta import Cotta
from benchmarks.healing.peers.lame import Lame
from benchmarks.healing.peers.note import Note
from benchmarks.healing.peers.roid import Roid
from benchmarks.healing.peers.selective import Eata, Sar
from benchmarks.healing.peers.shot import Shot
from benchmarks.healing.peers.supervised import FullTuning, HeadTuning

PEERS: dict[str, type[Peer]] = {
    "bn": BatchStatistics,
    "tent": Tent,
    "eata": Eata,
    "sar": Sar,
    "roid": Roid,
    "note": Note,
    "lame": Lame,
    "cotta": Cotta,
    "shot": Shot,
    "full": FullTuning,
    "head": HeadTuning,
}
