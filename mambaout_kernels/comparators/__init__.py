"""What MambaOut is compared with: token mixers and models of other papers.

Of the package only the command line and the benchmarks import it.
"""
