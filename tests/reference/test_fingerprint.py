"""What weights are known by."""

import os

from hafrm_ds.reference.fingerprint import HashMemory


def test_other_weights_of_the_same_size_and_time_of_modification_are_hashed_anew(tmp_path):
    """As two images have them that set one time for all files."""
    file, memory = tmp_path / "model.safetensors", HashMemory(tmp_path / "memory.json", {})
    file.write_bytes(b"one")
    os.utime(file, ns=(10**18, 10**18))
    first = memory.hash_of(file)
    assert memory.hash_of(file) == first and len(memory.known) == 1
    file.write_bytes(b"two")
    os.utime(file, ns=(10**18, 10**18))
    assert memory.hash_of(file) != first
