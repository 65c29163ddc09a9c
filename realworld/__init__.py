"""A small CapeLLM of real photographs, made with the programs of this repository on one core of a CPU.

    splits.json, descriptions.json    what trains, what is asked in the end, and in which words
    data.py                           lays two folders of photographs out as MP-100
    pretrain.py                       caches DINOv2's features and makes the small Llama from nothing
    baselines.py                      what knows no words: mean places, and patches that look alike
    figures.py                        curves, and the best and the worst answers
"""
