"""The code of ``emp-fast demo``: compares pruning rules on images with one budget of samples seen.

``datasets`` reads the images, ``models`` holds the networks, ``training`` runs one method once,
``comparison`` runs every method with several seeds and summarises, and ``figure`` draws the result.
"""
