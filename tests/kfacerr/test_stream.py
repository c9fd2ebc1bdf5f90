"""Windows may be given as people give them, and what a user prints says what it is."""

import numpy as np
import pytest

from kfacerr import Algorithm, EAFactor, ErrorStudy, KFactor, Recording, RecordingWriter, Settings, Step, Window
from kfacerr.stream import ordered

SETTINGS = Settings(rank=2)


@pytest.mark.parametrize("given", [Window(3, 4), [Window(3, 4)], [(3, 4)], ((np.int64(3), 4, 0),)])
def test_one_window_or_several_or_pairs(given):
    assert ordered(given) == [Window(3, 4)]
    assert ErrorStudy(["B-KFAC"], SETTINGS, given).windows == [Window(3, 4)]


def test_what_is_printed_says_what_it_is(tmp_path):
    path = tmp_path / "r.h5"
    X = np.random.default_rng(0).standard_normal((6, 2))
    with RecordingWriter(path) as writer:
        writer.add_layer("fc", d_A=6, d_G=6, n=2, bias=False, batch_size=2, update_every=1, windows=Window(0, 1))
        writer.append("fc", Step(0, X, X))
    algorithm = Algorithm.parse("B-KFAC rank=3")
    factor = KFactor("A", {"B": algorithm.process(SETTINGS, "A")}, 0.9)
    process = factor.processes["B"]
    assert repr(process) == "<kfacerr Brand at rank 3: nothing yet>"
    factor.push(0, X)
    average = EAFactor(0.9)
    assert repr(average) == "<kfacerr EAFactor, rho=0.9: nothing yet>"
    average.update(X)
    with Recording(path) as recording:
        shown = {
            recording: f"<kfacerr Recording {str(path)!r} of fc>",
            recording.layer("fc"): "<kfacerr LayerRecording 'fc': d_A=6, d_G=6, n=2, 1 steps>",
            algorithm: "Algorithm.parse('B-KFAC rank=3')",
            factor: "<kfacerr KFactor 'A': d=6, B>",
            process: "<kfacerr Brand at rank 3: <kfacerr LowRank: d=6, m=2>>",
            average: "<kfacerr EAFactor, rho=0.9: d=6>",
            writer: f"<kfacerr RecordingWriter {str(path)!r} of fc, closed>",
            ErrorStudy(["FD"], SETTINGS, [Window(0, 1)]): "<kfacerr ErrorStudy of FD, up to iteration -1>",
        }
        for value, expected in shown.items():
            assert repr(value) == expected
