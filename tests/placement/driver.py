"""A driver to be killed: places a pool, has an actor leave a child in a session of its own and shared memory, and waits.

`python driver.py HOW`; prints "FOLDER CHILD SHARED ADDRESS", then ends as HOW says: raise, return, or wait.
"""

import sys
import time

import ray
from rolecall.placement import Pool, place


@ray.remote
class Untidy:
    def litter(self):
        import subprocess
        from multiprocessing import shared_memory

        child = subprocess.Popen(["sleep", "600"], start_new_session=True)
        self.memory = shared_memory.SharedMemory(create=True, size=4096)
        return child.pid, self.memory.name


with place([Pool("all", cpus=0.5)]) as pools:
    placed = pools["all"]
    actor = Untidy.options(**placed.options(0)).remote()
    child, name = ray.get(actor.litter.remote(), timeout=60)
    print(placed.connection.folder, child, name, placed.connection.address, flush=True)
    if sys.argv[1] == "raise":
        raise RuntimeError("the controller's own mistake")
    if sys.argv[1] == "wait":
        time.sleep(600)
