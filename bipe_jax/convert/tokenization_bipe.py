"""A tokenizer for transformers that uses SentencePiece itself, with the ids of training.

bipe_jax writes this file to the directory of the weights:

tokenizer = AutoTokenizer.from_pretrained(DIRECTORY, trust_remote_code=True)

The library `tokenizers`, the default of transformers, chooses other pieces where two ways to split a text
are almost equally probable.
"""

import os
import shutil

import sentencepiece
from transformers import PreTrainedTokenizer


class BipeTokenizer(PreTrainedTokenizer):
    """Adds BOS where the model has one; "<s>" in a text is text (`split_special_tokens`)."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file, **kwargs):
        self.vocab_file = vocab_file
        self.processor = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return self.processor.vocab_size()

    def get_vocab(self):
        pieces = {self.processor.id_to_piece(i): i for i in range(self.vocab_size)}
        return pieces | self.added_tokens_encoder

    def _tokenize(self, text, **kwargs):
        return self.processor.encode(text, out_type=str)

    def _convert_token_to_id(self, token):
        return self.processor.piece_to_id(token)

    def _convert_id_to_token(self, index):
        return self.processor.id_to_piece(index)

    def convert_tokens_to_string(self, tokens):
        """The text of pieces, with special tokens, which SentencePiece alone omits."""
        special, parts, pieces = set(self.all_special_tokens), [], []
        for token in tokens:
            if token in special:
                parts += [self.processor.decode_pieces(pieces), token]
                pieces = []
            else:
                pieces.append(token)
        return "".join([*parts, self.processor.decode_pieces(pieces)])

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        bos = [] if self.bos_token_id is None else [self.bos_token_id]
        return bos + token_ids_0 + (bos + token_ids_1 if token_ids_1 else [])

    def save_vocabulary(self, save_directory, filename_prefix=None):
        name = (filename_prefix + "-" if filename_prefix else "") + "tokenizer.model"
        path = os.path.join(save_directory, name)
        if os.path.abspath(self.vocab_file) != os.path.abspath(path):
            shutil.copyfile(self.vocab_file, path)
        return (path,)
