"""kfacerr: how wrong is a cheap K-FAC inverse, and what does that error cost?"""
