"""Reports: on data (`inspect`) and on runs (`report`), on the terminal and as HTML."""
