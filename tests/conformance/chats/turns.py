"""Chats about turns: who speaks when, what is empty, which answers are flagged as context."""

from __future__ import annotations

from tests.conformance.chats.model import Chat, answer, chat, system, user

__all__ = ["CHATS"]

_ROLES = [
    chat("plain", user(), answer("Nothing much.")),
    chat("multi_turn", user("One?"), answer("The first."), user("Two?"), answer("The second.")),
    chat("system_first", system("Be brief."), user(), answer("Fine.")),
    chat("system_first_multi", system("Be brief."), user("1"), answer("I."), user("2"),
         answer("II.")),
    chat("system_middle", user("1"), answer("I."), system("Now in words."), user("2"),
         answer("Two.")),
    chat("system_twice", system("Be brief."), system("Be kind."), user(), answer("Dear, fine.")),
    chat("developer", system("Be exact."), user(), answer("3.14159"),
         marks={0: {"role": "developer"}}),
    chat("answer_is_system_text", system("Say this."), user(), answer("Say this.")),
    chat("only_user", user()),
    chat("ends_with_user", user("1"), answer("I."), user("2")),
    chat("assistant_first", answer("Welcome."), user(), answer("Nothing.")),
    chat("only_assistant", answer("Welcome.")),
    chat("two_assistants", user(), answer("Let me see."), answer("Nothing.")),
    chat("two_users", user("Hello"), user("Are you there?"), answer("I am.")),
    chat("same_as_user", user("Echo this."), answer("Echo this.")),
    chat("repeats_itself", user("Again?"), answer("Yes."), user("Again?"), answer("Yes.")),
    chat("fifty_turns", *(
        turn for n in range(25) for turn in (user(f"Say {n}."), answer(f"{n}, as you said."))
    )),
    chat("unknown_role", user(), answer("Hm."), marks={0: {"role": "narrator"}},
         bad="role narrator"),
]  # fmt: skip

_EMPTY = [
    chat("null_content", user("1"), answer(""), user("2"), answer("II."),
         marks={1: {"content": None}}),
    chat("empty_content", user("1"), answer(""), user("2"), answer("II.")),
    chat("space_content", user("1"), answer(" \n\t "), user("2"), answer("II.")),
    chat("last_is_empty", user("1"), answer("I."), user("2"), answer("")),
    chat("last_is_null", user("1"), answer("I."), user("2"), answer(""),
         marks={3: {"content": None}}),
    chat("last_is_space", user("1"), answer("I."), user("2"), answer("\n \n")),
    chat("only_empty", user(), answer("")),
    chat("only_null", user(), answer(""), marks={1: {"content": None}}),
    chat("only_space", user(), answer("  ")),
    chat("null_user", user(""), answer("You said nothing."), marks={0: {"content": None}}),
    chat("empty_users", system("Be brief."), user(""), answer("Ask me."), user("")),
    Chat("empty_conversation", {"messages": []}, ()),
    Chat("null_everything", {"messages": None, "tools": None}, ()),
]  # fmt: skip

_FLAGS = [
    chat("weights", user("1"), answer("I.", supervised=False), user("2"), answer("II."),
         marks={1: {"weight": 0}, 3: {"weight": 1}}),
    chat("weight_last_zero", user("1"), answer("I."), user("2"), answer("II.", supervised=False),
         marks={3: {"weight": 0}}),
    chat("weight_all_zero", user("1"), answer("I.", supervised=False), marks={1: {"weight": 0}}),
    chat("train_false", user("1"), answer("I.", supervised=False), user("2"), answer("II."),
         marks={1: {"train": False}}),
    chat("train_true", user("1"), answer("I."), user("2"), answer("II.", supervised=False),
         marks={1: {"train": True}, 3: {"train": False}}),
    chat("masked", user("1"), answer("I.", supervised=False), user("2"), answer("II."),
         marks={1: {"masked": True}, 3: {"masked": False}}),
    chat("flags_agree", user("1"), answer("I.", supervised=False), user("2"), answer("II."),
         marks={1: {"weight": 0, "train": False, "masked": True},
                3: {"weight": 1, "train": True, "masked": False}}),
    chat("flags_contradict", user("1"), answer("I."), user("2"), answer("II."),
         marks={1: {"weight": 1, "train": False}}, bad="weight 1 but train false"),
    chat("flags_contradict_masked", user("1"), answer("I."), user("2"), answer("II."),
         marks={3: {"train": True, "masked": True}}, bad="train true but masked"),
    chat("prefix", user(), answer("The answer is", open=True), marks={1: {"prefix": True}}),
    chat("prefix_multi", user("1"), answer("I."), user("2"), answer("It is", open=True),
         marks={3: {"prefix": True}}),
]  # fmt: skip

CHATS = (*_ROLES, *_EMPTY, *_FLAGS)
