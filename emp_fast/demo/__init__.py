"""What ``emp-fast demo`` runs: pruning rules compared on real images at one budget of samples seen.

``datasets`` reads the images, ``models`` holds the networks, ``training`` runs one method once, and
``comparison`` runs every method over several seeds and summarises.
"""
