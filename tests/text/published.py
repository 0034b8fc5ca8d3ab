"""The forms in which makers publish a tokenizer; each says where."""

from tests.text import forms_of_bytes, forms_of_gpt, forms_of_mistral, forms_of_pieces

FORMS = [
    *forms_of_pieces.FORMS,
    *forms_of_mistral.FORMS,
    *forms_of_bytes.FORMS,
    *forms_of_gpt.FORMS,
]
