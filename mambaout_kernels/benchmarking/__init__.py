"""The one timing harness, the shapes it runs on, and what it times; used by the command line and by benchmarks/."""
