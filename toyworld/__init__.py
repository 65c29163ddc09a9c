"""The worlds that toy.py draws: creatures (the toy MP-100), and the sheets that its backbones grow up with.

Here a point is a complex number, x + iy, so that a product turns and scales it. y points down.
"""
