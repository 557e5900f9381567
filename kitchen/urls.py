"""Maps the order desk's addresses to its views."""

from django.urls import path

from kitchen.views import api, board, order, service, status, takings

app_name = "kitchen"

urlpatterns = [
    path("", order.menu, name="menu"),
    path("orders/<int:pk>/", order.order, name="order"),
    path("board/", board.board, name="board"),
    path("board/columns/", board.board_columns, name="board-columns"),
    path("board/events/", board.events, name="board-events"),
    path("board/clear/", board.clear, name="board-clear"),
    path("board/orders/<int:pk>/move/", board.move, name="move"),
    path("status/", status.status, name="status"),
    path("status/feed/", status.feed, name="status-feed"),
    path("status/rush/", status.rush, name="rush"),
    path("takings.csv", takings.takings, name="takings"),
    path("api/menu/", api.menu, name="api-menu"),
    path("api/orders/", api.orders, name="api-orders"),
    path("kitchen/estimate/", service.estimate, name="estimate"),
]
