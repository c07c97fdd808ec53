"""Where the characters of a text are among its tokens."""

from __future__ import annotations

import numpy as np
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from pipeline.corpus.chat.rendering.encoder import TextEncoder
from pipeline.corpus.chat.rendering.render import Rendered
from pipeline.corpus.chat.rendering.tokenise import DocumentEnds, tokenise

TEXT = "ask me <end>  \nyes"


def _encoder() -> TextEncoder:
    words = {word: number for number, word in enumerate(["?", "ask", "me", "yes"])}
    backend = Tokenizer(WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_special_tokens([AddedToken("<end>", rstrip=True, special=True)])
    return TextEncoder(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_the_first_token_at_a_character_or_after_it() -> None:
    (encoded,) = _encoder().encode([TEXT])
    end, yes = TEXT.index("<end>"), TEXT.index("yes")
    assert encoded.ids_L.tolist() == [1, 2, 4, 3]
    found = {at: encoded.token_at(at) for at in (0, 1, 4, end, end + 5, yes, len(TEXT))}
    assert found == {
        0: (0, False),
        1: (1, True),  # inside a word
        4: (1, False),
        end: (2, False),
        end + 5: (3, True),  # in the white space that the token has taken
        yes: (3, False),
        len(TEXT): (4, False),
    }


def test_an_end_of_turn_that_takes_white_space_is_supervised_as_a_whole() -> None:
    stop = TEXT.index("<end>") + len("<end>")
    rendered = Rendered(TEXT, [(4, stop)])
    (tokens,) = tokenise([rendered], encoder=_encoder(), ends=DocumentEnds(None, None))
    assert tokens.input_ids.tolist() == [1, 2, 4, 3]
    np.testing.assert_array_equal(tokens.loss_mask, [False, True, True, False])
