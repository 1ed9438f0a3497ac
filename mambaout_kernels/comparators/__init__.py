"""What MambaOut is compared with: token mixers and models of other papers. Nothing else of the package imports it."""
