"""U-SAM and SAM-Med3D: networks, training, evaluation and prediction.

u-sam.py is the one program that uses this package; nothing here reads a data set's files.
"""
