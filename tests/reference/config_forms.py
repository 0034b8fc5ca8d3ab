"""Forms of config.json, and where they are published: the keys that a reader of the file meets,
without those that no model depends on. Sizes are those of the source; the tests shrink them.
"""

from tests.reference.forms_in_llamas_keys import OTHERS
from tests.reference.forms_of_llama import LLAMAS
from tests.reference.forms_of_others import OTHER_FAMILIES
from tests.reference.forms_refused import REFUSED

RUN = LLAMAS | OTHERS | OTHER_FAMILIES

__all__ = ["REFUSED", "RUN"]
