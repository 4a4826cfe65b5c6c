"""What the exercises are: which functions of the six files each one takes away, points, minutes.

`build.py` cuts these functions out of a student's copy, `grade.py` grades them. A name is a
function or a method, as "Attention.forward"; one that is gone from its file stops both, so that the
course cannot drift from the code.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Exercise:
    number: int
    title: str
    cut: dict  # file -> names of what is taken away, each with the label of its part ("1a")
    points: int
    minutes: int  # of a student's work
    level: str  # easy, middle or hard


EXERCISES = [
    Exercise(1, "Causal attention", {"model.py": {"Attention.forward": "1a"}}, 10, 60, "middle"),
    Exercise(2, "LoRA", {"model.py": {"lora_factors": "2a", "LoRALinear.forward": "2b",
                                      "LoRAHead.forward": "2b", "add_lora": "2c",
                                      "merge_lora": "2d"}}, 10, 60, "easy"),
    Exercise(3, "Lloyd's algorithm, with clusters that lose all points",
             {"cluster.py": {"nearest": "3a", "means": "3b", "kmeans": "3c"}}, 10, 90, "middle"),
    Exercise(4, "k-means++", {"cluster.py": {"seeds": "4a"}}, 5, 45, "middle"),
    Exercise(5, "Batches from clusters",
             {"cluster.py": {"cluster_batches": "5a", "shuffled_batches": "5b"}}, 5, 45, "easy"),
    Exercise(6, "The statistic of a cluster",
             {"hypernet.py": {"prompt_means": "6a", "features": "6b", "cluster_means": "6c"}},
             10, 60, "middle"),
    Exercise(7, "The hyper-network and the chameleon head",
             {"hypernet.py": {"HyperNetwork.__init__": "7a", "ChameleonHead.factors": "7b",
                              "ChameleonHead.forward": "7c"}}, 10, 75, "middle"),
    Exercise(8, "What is scored: the loss, and rows that share no token",
             {"data.py": {"Rows.batch": "8a", "cut": "8b"}, "train.py": {"losses": "8c"}},
             10, 75, "middle"),
    Exercise(9, "Catch the leak", {}, 10, 60, "hard"),  # the student writes leak_check.py
    Exercise(10, "Controls", {"eval.py": {"controls": "10a"}}, 10, 60, "middle"),
    Exercise(11, "The false win", {}, 10, 90, "middle"),  # the student writes false_win.json
    Exercise(12, "Beat lora-match", {}, 10, 300, "hard"),  # the student writes my_head.py
]
