"""ExFM's data augmentation service (section 3.2, Fig. 3a): impressions and their feedback become labelled examples.

`rayfm.augment.join` joins the streams when the feedback windows close; `rayfm.augment.window` lets a teacher score each
example once for all students that share it; `rayfm.augment.views` gives each student its own part of the result.
"""
