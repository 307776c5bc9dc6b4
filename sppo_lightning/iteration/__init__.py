"""One self-play iteration, from schedule to pairs with reference log-probs. Never sees a Trainer."""
