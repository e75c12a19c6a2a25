"""`lesft-client distill`: a training set of a teacher's right answers (METHOD section 2)."""
