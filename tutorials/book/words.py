"""The few words that the site itself says, in the languages of the pages."""

WORDS = {
    "en": {
        "book": "LoRA, beside its code",
        "language": "English",
        "contents": "Contents",
        "previous": "Previous",
        "next": "Next",
        "figure": "The code of the figure",
        "pane": "The code",
        "close": "Close",
        "skip": "To the text",
    },
    "vi": {
        "book": "LoRA, bên cạnh mã nguồn",
        "language": "Tiếng Việt",
        "contents": "Mục lục",
        "previous": "Trang trước",
        "next": "Trang sau",
        "figure": "Mã vẽ hình",
        "pane": "Mã nguồn",
        "close": "Đóng",
        "skip": "Đến nội dung",
    },
}


def of(language: str) -> dict[str, str]:
    """The words of a language, English for one that is not there."""
    return WORDS.get(language, WORDS["en"])
