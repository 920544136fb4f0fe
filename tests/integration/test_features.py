from tests.integration.runs import prepared, step_of, quiet
from training.loop import train
from typing import Any
import time

def test_a(make: Any) -> None:
    t=time.time()
    run = prepared(make())
    print("prepare", time.time()-t)
    for s in range(4):
        t=time.time()
        r=step_of(run, s); print(r.loss, time.time()-t)
    t=time.time()
    train(make(cache_features=True,out=make().out/"b"), quiet())
    print("train", time.time()-t)
