"""GSM8K's texts: final answers, annotations, units, what makes a problem hard, why a solution is wrong."""
