"""What things are: the vocabulary every other room shares.

No I/O lives here. Values are frozen; a change is a new value. Nothing in this package may import
another package of Godwit.
"""
