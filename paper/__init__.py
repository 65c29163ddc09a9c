"""What only the paper's comparisons need: instructions, Hiera, <KEYPOINT>, conversations in turns."""
