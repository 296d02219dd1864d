import os

# Tests never look for a hub, and two processes on one core each are faster than two that fight for both.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
