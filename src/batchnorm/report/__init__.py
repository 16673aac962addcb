"""Plain results of a training comparison, told as a terminal table and as one HTML page."""
