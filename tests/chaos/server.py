"""The product's server, for the soak; with CHAOS_WITHOUT_FENCE=1 its fence is taken out, to see whether the tester notices.

The fence is the comparison of tokens in `broker._claim`: a worker whose lease was given to another one is refused. Without it whoever has
ever had the job may write.
"""

import os
import sys

from colab_gpu import broker
from colab_gpu.cli import main
from colab_gpu.errors import JobNotFound, JobNotInProgress


def unfenced(tx, job_id, token):
    """`_claim`, but for the token."""
    job = tx.get(job_id)
    if job is None:
        raise JobNotFound(f"There is no job {job_id}.")
    if not job.grants:
        raise JobNotInProgress(f"Job {job_id} is {job.status}, not in progress.")
    return job


if __name__ == "__main__":
    if os.environ.get("CHAOS_WITHOUT_FENCE") == "1":
        assert callable(broker._claim)
        broker._claim = unfenced
    sys.exit(main(["serve", *sys.argv[1:]]))
