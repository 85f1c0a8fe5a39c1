"""RandAugment of a whole batch on the device, inside the jitted step; start reading at batch.py."""
