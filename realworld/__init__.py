"""A small CapeLLM of real photographs, made with the programs of this repository on one core of a CPU.

    splits.json, descriptions.json    what trains, what is asked in the end, and in which words
    data.py                           lays two folders of photographs out as MP-100
    features.py, lessons.py           what DINOv2 sees of the photos, and questions about it
    pretrain.py                       makes the small Llama from nothing
    baselines.py                      what knows no words: mean places, and patches that look alike
    figures.py                        curve, and the best and the worst answers
    make.py                           all of it by one command, and the table
"""
