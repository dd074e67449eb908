"""Factory: the job that lets a model write data, row by row, over any number of ranks."""
