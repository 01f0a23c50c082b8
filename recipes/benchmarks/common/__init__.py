"""What all topics share: the record of a result, the table, the figure, the mixes and the samplers."""
