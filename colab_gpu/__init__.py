"""colab-gpu: a job queue for GPUs that cannot be called, and the worker that serves it."""

__version__ = "0.1.0"
