"""Names of the files of a sweep."""

LOG = "tune.log"
TRIALS = "ray"  # Tune's directory, with one for each trial, in which there are

PARAMETERS = "parameters.json"  # written when the trial begins
FINISHED = "training.json"  # the history, once training has ended by itself
FAILED = "failed.txt"  # the reason
STOP = "stop"  # asks the job to end itself
