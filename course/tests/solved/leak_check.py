"""Exercise 9, solved: change one scored token at a time, to every other value."""

import torch


def leaks(predict, tokens, prompt, n_words):
    """Does any prediction depend on the token that it is scored on, or on a later one?"""
    before = predict(tokens)
    for row in range(len(tokens)):
        for place in range(int(prompt[row]), tokens.shape[1]):
            total = 0.0
            for word in range(n_words):
                changed = tokens.clone()
                changed[row, place] = word
                after = predict(changed)
                total += float(torch.exp(-after[row, place - 1]))
                same = torch.isclose(after, before, rtol=1e-7, atol=1e-9)
                same[row, place - 1:] = True  # its own loss, and what comes after, may change
                if not same.all():
                    return True
            if abs(total - 1) > 1e-6:  # probabilities of all values of the scored token
                return True
    return False
