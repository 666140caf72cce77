"""What a data set holds, for people to look at."""
