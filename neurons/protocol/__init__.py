"""What goes over the wire between neurons: the question, the answer, who says it, and sealed from whom."""
