"""One QEMU process: its command line, what it can do, its life, and the evidence it leaves."""
