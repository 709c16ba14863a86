"""The tuner: finds the fastest correct schedule of a kernel on a device. Start at `autotune.tuner.tune`."""
