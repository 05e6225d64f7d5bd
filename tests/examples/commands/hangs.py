"""A script that waits for ever before its first step, as one does for a peer that never comes."""

from __future__ import annotations

import argparse
import threading

import torch

parser = argparse.ArgumentParser()
parser.add_argument("--batch-size", type=int, required=True)
parser.parse_args()
torch.zeros(1, device="cuda")


def wait_for_peer() -> None:
    threading.Event().wait()


wait_for_peer()
