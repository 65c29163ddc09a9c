"""What only the paper's comparisons need: instructions, Hiera, <KEYPOINT>, conversations in turns."""

import json
from functools import partial
from pathlib import Path

from common import reading


def choose_parts(args, Encoder, Network, Chat):
    """The paper's own parts, and train.py's arguments -> ViT, CapeLLM and Chat as the arguments want them."""
    with reading(config := Path(args.vit, "config.json"), "say with --vit where the ViT is"):
        if json.loads(config.read_text())["model_type"] == "hiera":  # Table 4
            from paper.hiera import Hiera as Encoder
    if args.answer == "token":  # Table 8
        from paper.keypoint_token import KeypointChat as Chat
        from paper.keypoint_token import KeypointLLM as Network
    if args.pretrain or args.instruction != "description":  # Tables 3, 6, 7 and 9
        from paper.instructions import find_instruction
        return Encoder, Network, Chat(args.llm, find_instruction(args.instruction, args.pretrain))
    return Encoder, Network, Chat(args.llm)


def choose_locate(args, locate, cumulative=False):
    """The paper's decode.locate(), and train.py's arguments -> what asks the model that they made."""
    if args.instruction == "step" or args.answer == "token" or cumulative:  # Tables 7, 8; the ICCV version
        from paper.iccv import locate_in_turns
        return partial(locate_in_turns, cumulative=cumulative)
    return locate
