"""Scales that maps and charts share, in a terminal, in a picture and in a notebook."""

from __future__ import annotations

# The colours of cividis at equal steps, from low to high (Nuñez et al., PLOS ONE 2018): people with any common colour
# blindness see them in order, as they also differ in lightness.
CIVIDIS = ("#00224e", "#1a386f", "#434e6c", "#61656f", "#7d7c78", "#9b9476", "#bcae6c", "#dec958", "#fee838")
# Bits per byte. An axis of differences is linear up to here and logarithmic beyond: small ones keep their sign, and
# their noise stays small.
LINEAR_BELOW = 0.01
